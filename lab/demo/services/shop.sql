CREATE DATABASE IF NOT EXISTS shop;
CREATE OR REPLACE USER shop@'%' IDENTIFIED BY 'shop';
GRANT ALL ON shop.* TO shop@'%';
CREATE TABLE IF NOT EXISTS shop.items (id INT PRIMARY KEY, name VARCHAR(40));
REPLACE INTO shop.items VALUES (1, 'saddle'), (2, 'bridle'), (3, 'pillion');
